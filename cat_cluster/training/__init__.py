"""Packed training: several adapters in one U-Net forward, each as if it were alone."""

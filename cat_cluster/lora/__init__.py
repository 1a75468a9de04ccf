"""The LoRA bank: many adapters in one U-Net, one per row; and the files adapters travel in."""

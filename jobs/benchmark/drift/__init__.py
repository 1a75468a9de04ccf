"""What drift probes see."""

"""How jobs on a cluster stand, and why they do not move, in words."""

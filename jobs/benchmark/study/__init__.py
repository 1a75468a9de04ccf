"""What CAT does to adapters: trials, the study and the frontier."""

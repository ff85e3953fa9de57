"""Code that runs in processes beside us."""

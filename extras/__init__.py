"""What the core can do without, one concept a file; README.md lists them."""

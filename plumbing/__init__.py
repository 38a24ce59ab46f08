"""What nobody needs to read to understand the method; extras/README.md tells what stands where."""

"""What stands in for packages of others; put on the path of the programs that need it."""

"""What results look like, a module a result."""

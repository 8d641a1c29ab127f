"""What test files share; a test file imports no other test file."""

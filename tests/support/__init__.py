"""What several test files share: tiny bases, slower truths, real servers and processes. Nothing here is a test."""

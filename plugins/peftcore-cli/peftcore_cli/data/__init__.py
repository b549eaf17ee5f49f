"""Files of examples, read and checked as rows."""

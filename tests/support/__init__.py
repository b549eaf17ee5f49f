"""What tests share: tiny models, toy methods, files as other tools write them, and processes."""

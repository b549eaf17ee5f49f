"""What lets other libraries train and save models that carry adapters."""

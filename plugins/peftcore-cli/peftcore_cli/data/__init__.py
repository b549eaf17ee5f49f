"""Read and check files of examples."""

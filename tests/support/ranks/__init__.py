"""What the ranks of a distributed run do: `processes.run` calls these functions on each rank."""

"""The search: evolve genomes, train what they decode to, measure it, keep what is best."""

"""Building blocks of the architectures: sharded weights, linears, embedding, rope, attention and MLP blocks."""

"""Process groups, sharding of tensors, tensor-parallel layers and the vocabulary-parallel loss."""

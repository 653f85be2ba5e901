"""What `mpo filter` is made of: rules about a conversation and its pictures, a model's judgement, and the counts."""

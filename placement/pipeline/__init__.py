"""Pipelined train steps of the zoo's decoders: one SPMD program, stages on a mesh axis."""

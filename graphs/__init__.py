"""What the program is: ops, tensors, sharding rules, decision groups and meshes."""

"""What a plan costs: devices, topologies, collectives, operator times, memory, tables, simulation."""

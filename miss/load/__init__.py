"""What it takes to load a node and to see what that costs: instances, a sender, a node, the machine."""

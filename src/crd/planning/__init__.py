"""What a run will ask of a device, computed from its settings and the model's configuration files alone."""

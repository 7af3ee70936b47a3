"""What a parameter server does with late updates: one file per policy; join them with `+`."""

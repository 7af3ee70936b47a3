"""How a parameter server treats updates that come late: one small file per policy; join them with `+`."""

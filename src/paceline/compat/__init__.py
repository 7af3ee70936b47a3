"""Other projects' interfaces on top of Paceline, so that scripts written for them run unchanged."""

"""What a step costs: time, memory, and the seconds until the first one."""

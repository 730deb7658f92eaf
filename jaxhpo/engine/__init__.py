"""What runs a study: lanes, chunks on the device, pools on the host, checkpoints."""

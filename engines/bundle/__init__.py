"""What leaves for the device: format, head, replay buffer, versions, targets."""

"""What is learned: tasks, networks, losses, methods, engines, the loop, checkpoints, evaluation."""

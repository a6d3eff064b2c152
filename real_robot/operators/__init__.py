"""People at the robot: what they hold in their hands, and what becomes of it."""

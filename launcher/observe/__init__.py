"""What can be said about a job beyond its state: pure functions over API objects and over the run's own record."""

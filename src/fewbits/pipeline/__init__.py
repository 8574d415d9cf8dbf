"""Running a method over a model: one block at a time, continued where it stopped."""

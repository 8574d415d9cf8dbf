"""Text for calibration and measurement."""

"""What users see: progress bars, tables, figures as JSON."""

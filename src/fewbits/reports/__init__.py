"""What is shown of results: tables and pages, pure functions of the records."""

"""What was trained, in the forms that other people's tools load."""

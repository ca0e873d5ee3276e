"""Numbers and pages made from results."""

"""Goals, records and tables of results, and the pages made of them."""

"""What filters ask: attributes of products, filters as text, and search among what passes."""

"""A job in this process: prepare, train, measure, publish; and adapters that come from elsewhere."""

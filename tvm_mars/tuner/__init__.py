"""Search for schedules: the space, the cost model, the database, the runners."""

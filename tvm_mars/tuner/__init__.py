"""Search for schedules: the space, the cost model, the strategies, the database, the runners."""

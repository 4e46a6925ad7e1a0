"""Raw data sets to conversations, chat templates to exact token rows, work units."""

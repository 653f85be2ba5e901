"""The kinds of comparison behind `data_builders.verify`: pure functions of two short texts."""

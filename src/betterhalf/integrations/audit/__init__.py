"""The verb `audit`: read another framework's configuration, and derive the dtypes that it would really run."""

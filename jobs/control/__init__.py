"""Controller: reads facts, judges failures and outliers, plans (pure) and applies one pass through an executor."""

"""What several tests share: golden numbers, toy data sets and runs, damage, cases."""

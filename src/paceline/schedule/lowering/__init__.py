"""From a program's steps to the instruction lists that ranks execute."""

"""`python -m softprompt`"""

from softprompt.cli.main import main

main()

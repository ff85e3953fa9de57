from thaw_export.cli import main

main()

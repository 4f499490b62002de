from tests.interpreter import hasten

hasten()
